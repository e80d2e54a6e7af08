"""Adapters on disk as task vectors, and merged factors as adapters again.

``adapter`` opens any registered kind, ``kinds/`` holds one file per kind, ``dialects/`` knows
how programs spell tensor names, ``pack`` lays out an adapter to be written.
"""

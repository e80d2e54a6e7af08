"""Diffusion models in their two layouts: that of the original code, and that of diffusers.

``unet``, ``flux`` and ``clip`` hold tables of names; ``view`` lets an adapter see a base in both.
"""

"""Adapters in and out: against PEFT, against hand-computed files, against random ones."""

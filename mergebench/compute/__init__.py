"""The mathematics that methods and diagnostics share."""

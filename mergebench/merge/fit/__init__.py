"""What needs data: soups, searches and learned coefficients. Fitting writes numbers, as recipes."""

"""Options of the command line: declared once, read from recipes, checked before work begins."""

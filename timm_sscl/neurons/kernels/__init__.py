"""The recursion over time: its code, how it is compiled, and what is kept for the backward."""

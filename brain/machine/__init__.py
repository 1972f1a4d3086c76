"""The machine at hand: signals, memory, compilers and what is built by them."""

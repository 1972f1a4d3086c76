"""What ``brain task=…`` can do: one file for each."""

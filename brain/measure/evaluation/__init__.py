"""How well a policy remembers: fluency, retrieval and endurance, measured on any text."""

"""Vocabularies: one file per format, each turning a tokenizer file into a ``Vocabulary``.

They know text, ids and bytes. Which special token goes where is decided in ``brain.tokens``.
"""

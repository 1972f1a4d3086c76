"""How a conversation is written: chat templates, rendered once and cut into fixed texts.

This room knows templates, texts and tokenizers. It must not know how a conversation is led.
"""

"""Text in, text out: decoding token by token, generation settings, chat templates, and channels of an answer."""

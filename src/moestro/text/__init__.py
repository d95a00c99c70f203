"""Generate text from text: settings, chat templates, and the answer's text while its tokens are made."""

"""The parts of scripts/serve.py and scripts/chat.py. README.md says which file does what."""

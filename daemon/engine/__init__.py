"""Token ids in, token ids out. The front door is `requests`: all that api/ may import."""

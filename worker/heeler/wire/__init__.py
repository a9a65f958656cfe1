"""What outside systems say on the wire: names, numbers and message classes. No behaviour, and nothing of ours."""

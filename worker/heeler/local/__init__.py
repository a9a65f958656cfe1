"""Stand-ins for local testing. Needs the extra `local`; nothing of it is imported by a worker."""

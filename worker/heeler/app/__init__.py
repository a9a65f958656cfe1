"""The user's program: how it is started, told, watched and ended. Never imports sources or heeler_sync."""

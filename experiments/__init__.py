"""One question a script, a folder a room: `scripts/run NAME`."""

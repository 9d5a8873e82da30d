"""One question a module, in the room that it asks about; see README.md."""

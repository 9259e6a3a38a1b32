"""One question each: ``measure`` answers it with a record, ``tables`` shows what a record holds."""

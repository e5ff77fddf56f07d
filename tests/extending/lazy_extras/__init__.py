"""A package that is none of lazycompress, and brings one of each kind; `docs/extending.md` tells how."""

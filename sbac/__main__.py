"""``python -m sbac`` is the command ``sbac``."""

from sbac.cli import main

raise SystemExit(main())

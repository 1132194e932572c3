"""``python -m twloss``: the demo of ``twloss/demo``."""

from twloss.demo.start import main

if __name__ == "__main__":
    raise SystemExit(main())

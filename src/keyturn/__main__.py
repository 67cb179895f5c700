"""`python -m keyturn` is the same program as `keyturn`."""

from keyturn.entry import main

main()

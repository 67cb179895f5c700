"""WHAT survives: tables, journal, audit and ledger, on SQLite and PostgreSQL."""

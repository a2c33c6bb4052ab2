"""Typed Protocols that mirror the clauses, one module per room."""

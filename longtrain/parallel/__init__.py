"""One sequence over many processes: other ways for queries to meet the keys they see. Imports `stream`, which does not know it."""

"""One sequence over many processes: other ways for keys and values to reach the queries that need them. Imports `stream` and `ops`, never the other way."""

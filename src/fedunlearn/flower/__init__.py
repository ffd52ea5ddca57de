"""Everything that imports Flower: engine, clients, messages, secure aggregation, apps."""

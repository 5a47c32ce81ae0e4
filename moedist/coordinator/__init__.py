"""The coordinator: measures every rank, plans, and moves experts while training goes on."""

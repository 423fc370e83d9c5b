"""The sweep over checkpoints, and what is made of its scores: tables, statistics, figures,
reports."""

"""Closed-form repair of what a cut leaves."""

"""Feedback agents: who criticises, revises and judges answers, one kind a file."""

"""`python -m llmrecipe` is the `llmrecipe` command."""

from __future__ import annotations

from llmrecipe.cli.app import main

if __name__ == "__main__":
    main()

"""The foundation of every package: registry, errors, option types, paths, console, locks, HTTP; nothing here imports torch."""

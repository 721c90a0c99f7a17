"""What every package stands on: the registry, errors, option types, paths, console, locks, HTTP; nothing here imports torch."""

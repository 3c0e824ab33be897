"""The launcher: settings + config + task YAML -> plan (pure, printable) -> an infrastructure runs it."""

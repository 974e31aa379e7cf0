"""Pure descriptions: mesh, layouts, tensor tables, model specs, configuration, messages, errors. No torch."""

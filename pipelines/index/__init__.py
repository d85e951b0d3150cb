"""What index workers do: sources in four layouts, their description, the steps of a build, a look inside."""

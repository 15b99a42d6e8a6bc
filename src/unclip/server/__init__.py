"""The HTTP server: OpenAI's Images API and jobs, over the session layer."""

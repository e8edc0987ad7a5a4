"""Records in, figures and verdicts out; nothing here touches a server."""

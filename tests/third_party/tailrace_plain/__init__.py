"""An adapter that lives outside tailrace: what docs/extend.md says, done."""

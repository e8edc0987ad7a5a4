"""An adapter that lives outside tailrace: what CONTRIBUTING.md says, done."""

"""The figures of a report: small, drawn once for phone and desktop, with failures visible as ∞ and never left out."""

"""The ground floor: what any module may use, and what needs nothing but Python itself."""

"""The ground floor: helpers that any module may use and that need nothing but Python itself."""

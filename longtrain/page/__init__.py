"""Pages of HTML that open from disk and ask no network: text, tables, and charts that `page.js` draws of data."""

-- Handfast's fence: what this service did for each branch of a global transaction. SQLite 3.42 or newer.
--
-- One row for each branch, written in the same local transaction as the service's own work. Only the SDK writes here. Never
-- delete a row by hand: the SDK knows when nobody can ask for it any more (Fence::clean_up). All times are UTC milliseconds
-- since 1970 by this database's clock. For people there is a view: handfast_fence_readable.

CREATE TABLE IF NOT EXISTS handfast_fence (
    xid        BLOB    NOT NULL, -- the global transaction: partition (2 bytes), epoch (4), sequence (6), nonce (4), big-endian
    branch_id  BLOB    NOT NULL, -- the branch: 1 to 32 bytes of text, filled up with zeros to 32
    state      INTEGER NOT NULL CHECK (state IN (1, 2, 3, 4)), -- 1 tried, 2 confirmed, 3 cancelled, 4 suspended: cancelled, never tried
    action     TEXT    NOT NULL, -- what was asked for, such as inventory.deduct; written by Try, or by the Cancel that came first
    payload    BLOB,             -- what Try got, at most 64 KiB; Confirm and Cancel get the same. NULL: never tried
    reply      BLOB,             -- what Try answered, at most 64 KiB; a repeated Try answers the same. NULL: never tried
    digest     BLOB,             -- SHA-256 over action and payload: whether a Try repeats this one. NULL: never tried
    expires_at INTEGER,          -- end of phase one, as the call that made the row says. NULL: it says none
    created_at INTEGER NOT NULL, -- when the row was made
    changed_at INTEGER NOT NULL, -- when state or reply last changed; the clean-up counts from here
    seen       INTEGER NOT NULL, -- calls that came for this branch, the first one included. 1: nobody has repeated it or gone on
    asks       INTEGER,          -- 1: the transaction may be lost without a Cancel, so this service asks about the branch from expires_at on
    PRIMARY KEY (xid, branch_id)
) STRICT;

-- For the clean-up, which deletes what is final and old.
CREATE INDEX IF NOT EXISTS handfast_fence_clean_up ON handfast_fence (changed_at) WHERE state <> 1;

-- For the inquiry, which asks about what is tried and overdue. It holds only what is tried, so it stays small.
CREATE INDEX IF NOT EXISTS handfast_fence_tried ON handfast_fence (expires_at, xid, branch_id) WHERE state = 1;

-- It uses nothing that SQLite 3.37 does not have: people read it with the SQLite that they find.
DROP VIEW IF EXISTS handfast_fence_readable;
CREATE VIEW handfast_fence_readable AS
SELECT
    (WITH RECURSIVE digit(n, value) AS (
        VALUES (1, 0) UNION ALL
        SELECT n + 1, value * 16 + instr('123456789ABCDEF', substr(hex(xid), n, 1)) FROM digit WHERE n <= 4
    ) SELECT value FROM digit WHERE n = 5) || '-' ||
    (WITH RECURSIVE digit(n, value) AS (
        VALUES (5, 0) UNION ALL
        SELECT n + 1, value * 16 + instr('123456789ABCDEF', substr(hex(xid), n, 1)) FROM digit WHERE n <= 12
    ) SELECT value FROM digit WHERE n = 13) || '-' ||
    (WITH RECURSIVE digit(n, value) AS (
        VALUES (13, 0) UNION ALL
        SELECT n + 1, value * 16 + instr('123456789ABCDEF', substr(hex(xid), n, 1)) FROM digit WHERE n <= 24
    ) SELECT value FROM digit WHERE n = 25) || '-' ||
    lower(substr(hex(xid), 25, 8)) AS xid,
    CAST(CASE instr(branch_id, x'00') WHEN 0 THEN branch_id ELSE substr(branch_id, 1, instr(branch_id, x'00') - 1) END AS TEXT)
        AS branch_id,
    CASE state WHEN 1 THEN 'tried' WHEN 2 THEN 'confirmed' WHEN 3 THEN 'cancelled' WHEN 4 THEN 'suspended' END AS state,
    action,
    length(payload) AS payload_bytes,
    length(reply) AS reply_bytes,
    strftime('%Y-%m-%dT%H:%M:%fZ', expires_at / 1000.0, 'unixepoch') AS expires_at,
    strftime('%Y-%m-%dT%H:%M:%fZ', created_at / 1000.0, 'unixepoch') AS created_at,
    strftime('%Y-%m-%dT%H:%M:%fZ', changed_at / 1000.0, 'unixepoch') AS changed_at,
    seen
FROM handfast_fence;

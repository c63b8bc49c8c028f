-- Version 2: an owner is known by its epoch and its nonce, a transaction's row says how many branches it has, and the store
-- remembers which epochs have lost something. The file knows whether something is missing beside it.

-- The number of the epoch's latest batch, as before. It has another name, so that a program of version 1 can neither take over
-- nor write: it would not check the nonce.
ALTER TABLE partition RENAME COLUMN position TO batches;

-- Random, of the epoch: two copies of a file that went apart can have the same epoch, but not the same nonce.
ALTER TABLE partition ADD COLUMN nonce INTEGER NOT NULL DEFAULT 0;
UPDATE partition SET nonce = coalesce((SELECT e.nonce FROM epoch AS e
    WHERE e.partition = partition.partition AND e.epoch = partition.epoch), 0);

-- When the next owner took over; NULL: nobody has yet.
ALTER TABLE epoch ADD COLUMN ended_at INTEGER;
-- How many batches it had when the next owner took over. Its own owner may know of more, which are lost then.
ALTER TABLE epoch ADD COLUMN batches INTEGER;
-- Steps of the purge under this epoch.
ALTER TABLE epoch ADD COLUMN purges INTEGER NOT NULL DEFAULT 0;
-- Batches that the store acknowledged under this epoch and then lost, as its owner noticed; NULL: none. What is missing of such
-- an epoch is answered LOST.
ALTER TABLE epoch ADD COLUMN lost INTEGER;

-- How many rows it has in `branch`; NULL: recorded by version 1.
ALTER TABLE global_transaction ADD COLUMN branches INTEGER;
-- What its initiator gave with Confirm, for a repeat: at most 4 KiB; NULL: nothing.
ALTER TABLE global_transaction ADD COLUMN result BLOB;
-- Content type of the result.
ALTER TABLE global_transaction ADD COLUMN result_type TEXT;

-- The file names its WAL before that begins, and the WAL says its name in its first commit. See `mark.rs`.
CREATE TABLE mark (
    one       INTEGER PRIMARY KEY CHECK (one = 1),  -- there is one row
    needed    INTEGER NOT NULL,     -- random: the name of the WAL that belongs to this file
    present   INTEGER NOT NULL,     -- the same number: that WAL is there, or the file has all of it
    backup_at INTEGER               -- when `handfast backup` made this copy; NULL: it is no backup
) WITHOUT ROWID;

INSERT INTO mark (one, needed, present) VALUES (1, 0, 0);

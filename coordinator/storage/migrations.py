"""The database's history: each migration is a named function, never changed once released."""

from __future__ import annotations

import json

from coordinator.storage.connection import Connection

# Times are seconds since 1970. Digests are hex sha256. JSON columns hold msgspec structs.


def create_devices(connection: Connection) -> None:
    """Enrolled devices, one-time tokens, and nonces that must not come again."""
    connection.execute(
        """CREATE TABLE devices (
            device_id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            class TEXT NOT NULL,
            public_key TEXT NOT NULL,
            enrolled_s REAL NOT NULL,
            revoked_s REAL,
            seen_s REAL,             -- last check-in
            cap_bytes INTEGER,
            floor_bytes INTEGER,
            example_count INTEGER,
            runtime_version TEXT
        )"""
    )
    connection.execute("CREATE UNIQUE INDEX device_names ON devices (name) WHERE revoked_s IS NULL")
    connection.execute(
        """CREATE TABLE tokens (
            token_sha256 TEXT PRIMARY KEY,
            expires_s REAL NOT NULL,
            device_id TEXT REFERENCES devices   -- who used it
        )"""
    )
    connection.execute(
        """CREATE TABLE nonces (
            device_id TEXT NOT NULL REFERENCES devices,
            nonce TEXT NOT NULL,
            expires_s REAL NOT NULL,
            PRIMARY KEY (device_id, nonce)
        ) WITHOUT ROWID"""
    )
    connection.execute("CREATE INDEX nonce_expiry ON nonces (expires_s)")


def create_runs(connection: Connection) -> None:
    """Runs, rounds, slots, tasks, results, evaluations, events."""
    connection.execute(
        """CREATE TABLE runs (
            position INTEGER PRIMARY KEY,       -- runs take turns in this order
            run_id TEXT NOT NULL UNIQUE,
            config TEXT NOT NULL,               -- JSON RunConfig
            package_sha256 TEXT NOT NULL,
            package_signature TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'evaluating',
                                                 'finished', 'failed', 'stopped')),
            reason TEXT NOT NULL DEFAULT '',
            created_s REAL NOT NULL,
            started_s REAL,
            finished_s REAL,
            values_sha256 TEXT NOT NULL,        -- current slice values
            optimizer_sha256 TEXT,              -- server optimiser state beside them
            next_round INTEGER NOT NULL DEFAULT 0,
            committed INTEGER NOT NULL DEFAULT 0,
            abandoned_in_a_row INTEGER NOT NULL DEFAULT 0
        )"""
    )
    connection.execute(
        """CREATE TABLE rounds (
            run_id TEXT NOT NULL REFERENCES runs (run_id),
            round INTEGER NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('selecting', 'collecting', 'aggregating',
                                                 'committed', 'abandoned')),
            reason TEXT NOT NULL DEFAULT '',
            opened_s REAL NOT NULL,
            deadline_s REAL NOT NULL,
            closed_s REAL,
            values_sha256 TEXT NOT NULL,        -- slice values the round starts from
            bytes_up INTEGER NOT NULL DEFAULT 0,
            bytes_down INTEGER NOT NULL DEFAULT 0,
            PRIMARY KEY (run_id, round)
        )"""
    )
    connection.execute(
        """CREATE TABLE slots (
            run_id TEXT NOT NULL,
            round INTEGER NOT NULL,
            slot INTEGER NOT NULL,
            slices TEXT NOT NULL,               -- JSON list of slice names
            PRIMARY KEY (run_id, round, slot),
            FOREIGN KEY (run_id, round) REFERENCES rounds
        )"""
    )
    connection.execute(
        """CREATE TABLE tasks (
            task_id TEXT PRIMARY KEY,
            run_id TEXT NOT NULL,
            round INTEGER NOT NULL,
            slot INTEGER NOT NULL,
            attempt INTEGER NOT NULL,           -- 0 for the first device of the slot
            device_id TEXT NOT NULL REFERENCES devices,
            state TEXT NOT NULL CHECK (state IN ('reserved', 'working', 'counted', 'lapsed')),
            reason TEXT NOT NULL DEFAULT '',
            reserved_s REAL NOT NULL,
            due_s REAL NOT NULL,                -- to check in while reserved, to deliver while working
            required_bytes INTEGER NOT NULL DEFAULT 0,
            task TEXT,                          -- the signed JSON once handed out
            signature TEXT,
            UNIQUE (run_id, round, slot, attempt),
            FOREIGN KEY (run_id, round, slot) REFERENCES slots
        )"""
    )
    connection.execute(
        "CREATE UNIQUE INDEX one_counted ON tasks (run_id, round, slot) WHERE state = 'counted'"
    )
    connection.execute(
        """CREATE TABLE results (
            task_id TEXT PRIMARY KEY REFERENCES tasks,
            change_sha256 TEXT NOT NULL,
            examples INTEGER NOT NULL,
            steps_applied INTEGER NOT NULL,
            steps_skipped INTEGER NOT NULL,
            mean_loss REAL,
            seconds REAL NOT NULL,
            memory TEXT NOT NULL,               -- JSON MemoryReport
            received_s REAL NOT NULL
        )"""
    )
    connection.execute(
        """CREATE TABLE evaluations (
            run_id TEXT NOT NULL REFERENCES runs (run_id),
            round INTEGER NOT NULL,             -- -1: the values the run started from
            values_sha256 TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('pending', 'done', 'failed')),
            rows INTEGER,
            accuracy REAL,
            mean_loss REAL,
            seconds REAL,
            message TEXT NOT NULL DEFAULT '',
            PRIMARY KEY (run_id, round)
        )"""
    )
    connection.execute(
        """CREATE TABLE events (
            event_id INTEGER PRIMARY KEY,
            at_s REAL NOT NULL,
            run_id TEXT,
            round INTEGER,
            device TEXT,                        -- the device's name
            task_id TEXT,
            code TEXT NOT NULL,
            message TEXT NOT NULL
        )"""
    )
    connection.execute("CREATE INDEX events_by_run ON events (run_id, event_id)")


def count_evaluated_tokens(connection: Connection) -> None:
    """The number of predicted tokens that an evaluation's loss is a mean over; with 0 it is a mean over rows."""
    connection.execute("ALTER TABLE evaluations ADD COLUMN tokens INTEGER NOT NULL DEFAULT 0")


def deal_heads(connection: Connection) -> None:
    """Slots of open rounds name the head, where the run trains it: it used to go to all of them unnamed."""
    rows = connection.execute(
        "SELECT run_id, round, slot, slices, config FROM slots JOIN rounds USING (run_id, round)"
        " JOIN runs USING (run_id) WHERE rounds.state IN ('selecting', 'collecting', 'aggregating')"
    ).fetchall()
    for run_id, number, slot, slices, config in rows:
        if json.loads(config).get("train_head", True):
            dealt = json.dumps([*json.loads(slices), "head"], separators=(",", ":"))
            connection.execute(
                "UPDATE slots SET slices = ? WHERE run_id = ? AND round = ? AND slot = ?",
                (dealt, run_id, number, slot),
            )


def count_change_bytes(connection: Connection) -> None:
    """The size of each counted result's delta on its way; 0 for results that were stored before."""
    connection.execute("ALTER TABLE results ADD COLUMN change_bytes INTEGER NOT NULL DEFAULT 0")


def keep_more_values(connection: Connection) -> None:
    """Blobs beside a run's values: their mean over rounds, and the deltas that directions are compared with."""
    connection.execute("ALTER TABLE runs ADD COLUMN average_sha256 TEXT")
    connection.execute("ALTER TABLE runs ADD COLUMN reference_sha256 TEXT")


def mark_gated_rounds(connection: Connection) -> None:
    """Whether a committed round left the values as they were, because its halves differed too much."""
    connection.execute("ALTER TABLE rounds ADD COLUMN gated INTEGER NOT NULL DEFAULT 0")


def index_what_is_open(connection: Connection) -> None:
    """Indexes for check-ins, which ask for open tasks and open rounds: without them all that ever were are read."""
    connection.execute(
        "CREATE INDEX open_rounds ON rounds (run_id, round)"
        " WHERE state IN ('selecting', 'collecting', 'aggregating')"
    )
    connection.execute(
        "CREATE INDEX open_tasks ON tasks (run_id, device_id) WHERE state IN ('reserved', 'working')"
    )


def set_devices_aside(connection: Connection) -> None:
    """When each device is expected again, what it is set up with, and which devices a run asks no more."""
    connection.execute("ALTER TABLE devices ADD COLUMN expected_s REAL")  # end of the window it was told
    connection.execute("ALTER TABLE devices ADD COLUMN setup TEXT NOT NULL DEFAULT ''")
    connection.execute("ALTER TABLE devices ADD COLUMN resumed_s REAL")  # failures before this do not count
    connection.execute(
        """CREATE TABLE set_aside (
            run_id TEXT NOT NULL REFERENCES runs (run_id),
            device_id TEXT NOT NULL REFERENCES devices,
            at_s REAL NOT NULL,
            reason TEXT NOT NULL,
            setup TEXT NOT NULL,                -- of the device at that moment
            PRIMARY KEY (run_id, device_id)
        ) WITHOUT ROWID"""
    )


def visit_devices(connection: Connection) -> None:
    """Phases in which every device is asked once, and which phase each round belongs to."""
    connection.execute("ALTER TABLE runs ADD COLUMN phase TEXT NOT NULL DEFAULT 'training'")
    connection.execute("ALTER TABLE runs ADD COLUMN visit_rounds INTEGER NOT NULL DEFAULT 0")
    connection.execute("ALTER TABLE rounds ADD COLUMN phase TEXT NOT NULL DEFAULT 'training'")


def publish_releases(connection: Connection) -> None:
    """Values that devices are to use; runs that publish each round; and devices that take no tasks."""
    connection.execute("ALTER TABLE devices ADD COLUMN trains INTEGER NOT NULL DEFAULT 1")
    connection.execute("ALTER TABLE devices ADD COLUMN release INTEGER NOT NULL DEFAULT 0")
    connection.execute(
        """CREATE TABLE releases (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            run_id TEXT NOT NULL REFERENCES runs (run_id),
            round INTEGER NOT NULL,
            values_sha256 TEXT NOT NULL,
            lowest_accuracy REAL,
            highest_loss REAL,
            published_s REAL NOT NULL
        )"""
    )
    connection.execute(
        """CREATE TABLE published_runs (        -- each further committed round of these becomes a release
            run_id TEXT PRIMARY KEY REFERENCES runs (run_id),
            lowest_accuracy REAL,
            highest_loss REAL
        ) WITHOUT ROWID"""
    )


def state_estimators(connection: Connection) -> None:
    """How a device found its gradients where its task left it the choice, and with how many draws."""
    connection.execute("ALTER TABLE results ADD COLUMN estimator TEXT")
    connection.execute("ALTER TABLE results ADD COLUMN draws INTEGER NOT NULL DEFAULT 0")


def compare_results(connection: Connection) -> None:
    """How large each result was beside its round's median, which were left out, and what a run's last round had."""
    connection.execute("ALTER TABLE results ADD COLUMN score REAL")
    connection.execute("ALTER TABLE results ADD COLUMN left_out TEXT NOT NULL DEFAULT ''")
    connection.execute("ALTER TABLE runs ADD COLUMN delta_sizes TEXT NOT NULL DEFAULT '{}'")  # JSON, by group


def mark_moments(connection: Connection) -> None:
    """Moments that the coordinator remembers, by name."""
    connection.execute("CREATE TABLE marks (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID")


def expect_signs_of_life(connection: Connection) -> None:
    """Until when a device that works on a task must have said so again; nothing for one that never did."""
    connection.execute("ALTER TABLE tasks ADD COLUMN alive_by_s REAL")


def pause_runs(connection: Connection) -> None:
    """When the operator paused a run; nothing for one that goes on."""
    connection.execute("ALTER TABLE runs ADD COLUMN paused_s REAL")


def keep_checkpoints(connection: Connection) -> None:
    """What a run had come to after each committed round, and which rounds the operator took back."""
    connection.execute("ALTER TABLE rounds ADD COLUMN rolled_back_s REAL")
    connection.execute(
        """CREATE TABLE checkpoints (
            run_id TEXT NOT NULL REFERENCES runs (run_id),
            round INTEGER NOT NULL,
            values_sha256 TEXT NOT NULL,
            optimizer_sha256 TEXT,              -- discarded by and by: see MOST_STATES
            average_sha256 TEXT,
            reference_sha256 TEXT,
            committed INTEGER NOT NULL,
            visit_rounds INTEGER NOT NULL,
            phase TEXT NOT NULL,
            delta_sizes TEXT NOT NULL,
            PRIMARY KEY (run_id, round)
        ) WITHOUT ROWID"""
    )


def index_tasks_of_devices(connection: Connection) -> None:
    """An index for the question which run a device last worked for."""
    connection.execute("CREATE INDEX tasks_of_devices ON tasks (device_id, reserved_s)")


def buffer_results(connection: Connection) -> None:
    """Which round a result entered, where that is not its task's, and how old the values of each task are."""
    connection.execute("ALTER TABLE results ADD COLUMN entered INTEGER")
    # Rounds that the run had committed when the task was handed out.
    connection.execute("ALTER TABLE tasks ADD COLUMN committed_before INTEGER NOT NULL DEFAULT 0")
    connection.execute("CREATE INDEX entered_results ON results (entered) WHERE entered IS NOT NULL")


def tell_eligibility(connection: Connection) -> None:
    """Why a device may not work now, as it said at its last check-in; empty if it may."""
    connection.execute("ALTER TABLE devices ADD COLUMN not_eligible TEXT NOT NULL DEFAULT ''")


def take_sums_off(connection: Connection) -> None:
    """Of sums that a device handed in before, which a result keeps and which it takes off again."""
    connection.execute("ALTER TABLE results ADD COLUMN kept TEXT NOT NULL DEFAULT '[]'")  # JSON digests
    connection.execute("ALTER TABLE results ADD COLUMN removed TEXT NOT NULL DEFAULT '[]'")  # JSON digests


def score_groups(connection: Connection) -> None:
    """What an evaluation found on the rows of each group."""
    connection.execute("ALTER TABLE evaluations ADD COLUMN group_scores TEXT NOT NULL DEFAULT '{}'")  # JSON


def share_between_processes(connection: Connection) -> None:
    """What several coordinator processes hold in common: facts by name, and parts of results on their way."""
    connection.execute("CREATE TABLE shared (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
    connection.execute(
        """CREATE TABLE upload_parts (          -- used where the database is a server's; else they are files
            task_id TEXT NOT NULL,
            sha256 TEXT NOT NULL,               -- of the whole result
            first_byte INTEGER NOT NULL,
            data BLOB NOT NULL,
            PRIMARY KEY (task_id, sha256, first_byte)
        ) WITHOUT ROWID"""
    )


def keep_users(connection: Connection) -> None:
    """People who may sign in, their sessions, what anybody did, and an index for the events of one device."""
    connection.execute(
        """CREATE TABLE users (
            name TEXT PRIMARY KEY,
            role TEXT NOT NULL CHECK (role IN ('viewer', 'operator', 'admin')),
            password TEXT,                      -- scrypt, with its parameters and salt
            token_sha256 TEXT UNIQUE,
            created_s REAL NOT NULL
        ) WITHOUT ROWID"""
    )
    connection.execute(
        """CREATE TABLE sessions (
            session_sha256 TEXT PRIMARY KEY,
            name TEXT NOT NULL,                 -- of the user, or of the admin token
            credential TEXT NOT NULL,           -- digest of what it was opened with; ends with that
            csrf TEXT NOT NULL,
            expires_s REAL NOT NULL
        ) WITHOUT ROWID"""
    )
    connection.execute(
        """CREATE TABLE audit (
            audit_id INTEGER PRIMARY KEY,
            at_s REAL NOT NULL,
            who TEXT NOT NULL,                  -- empty for a stranger
            act TEXT NOT NULL,
            subject TEXT NOT NULL,
            outcome TEXT NOT NULL,              -- begun, done, or the code of a refusal
            detail TEXT NOT NULL DEFAULT ''
        )"""
    )
    connection.execute("CREATE INDEX results_by_time ON results (received_s)")
    connection.execute("CREATE INDEX audit_of_strangers ON audit (audit_id) WHERE who = ''")
    connection.execute("CREATE INDEX events_of_devices ON events (device, event_id) WHERE device IS NOT NULL")


def protect_contributions(connection: Connection) -> None:
    """What runs with privacy have spent, and which devices know how to protect what they contribute."""
    connection.execute(
        """CREATE TABLE privacy_spent (
            run_id TEXT NOT NULL REFERENCES runs (run_id),
            round INTEGER NOT NULL,
            participations INTEGER NOT NULL,    -- of the busiest device
            epsilon REAL NOT NULL,
            PRIMARY KEY (run_id, round)
        ) WITHOUT ROWID"""
    )
    connection.execute(
        "CREATE TABLE protecting_devices (device_id TEXT PRIMARY KEY REFERENCES devices) WITHOUT ROWID"
    )


def mask_contributions(connection: Connection) -> None:
    """How far open rounds with masked contributions are, and what their devices answered."""
    connection.execute(
        """CREATE TABLE masked_rounds (
            run_id TEXT NOT NULL REFERENCES runs (run_id),
            round INTEGER NOT NULL,
            stage TEXT NOT NULL CHECK (stage IN ('shares', 'vector', 'reveal')),
            due_s REAL NOT NULL,
            PRIMARY KEY (run_id, round)
        ) WITHOUT ROWID"""
    )
    connection.execute(
        """CREATE TABLE masked_answers (
            task_id TEXT NOT NULL REFERENCES tasks (task_id),
            stage TEXT NOT NULL CHECK (stage IN ('keys', 'shares', 'vector', 'reveal')),
            data BLOB NOT NULL,                 -- of a vector its digest
            PRIMARY KEY (task_id, stage)
        ) WITHOUT ROWID"""
    )


#: In the order in which they run.
ALL = (
    create_devices,
    create_runs,
    count_evaluated_tokens,
    deal_heads,
    count_change_bytes,
    keep_more_values,
    mark_gated_rounds,
    index_what_is_open,
    set_devices_aside,
    visit_devices,
    publish_releases,
    state_estimators,
    compare_results,
    mark_moments,
    expect_signs_of_life,
    pause_runs,
    keep_checkpoints,
    index_tasks_of_devices,
    buffer_results,
    tell_eligibility,
    take_sums_off,
    score_groups,
    share_between_processes,
    keep_users,
    protect_contributions,
    mask_contributions,
)

"""${message}.

Revision: ${up_revision}
Revises: ${down_revision | comma,n}
Created: ${create_date}
"""

import sqlalchemy as sa

from zoho_orm_store.migrations.support import op, revision_step
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


@revision_step
def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


@revision_step
def downgrade() -> None:
    ${downgrades if downgrades else "pass"}

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from casemate.hypervisor.attachments import attachment_of, plugged_of
from casemate.types import Attachment, BlockAttachment, NicAttachment

names = st.from_regex(r"[a-z]{1,8}[0-9]{0,3}", fullmatch=True)
attachments = st.one_of(
    st.builds(
        BlockAttachment,
        id=names,
        path=names.map("/images/{}".format),
        readonly=st.booleans(),
        pci_path=st.just("0f/00"),
        device=st.none() | names.map("/dev/{}".format),
    ),
    st.builds(
        NicAttachment,
        id=names,
        mac=st.just("02:00:00:00:00:01"),
        tap=names,
        netns=st.none() | names,
        pci_path=st.just("10/00/01"),
        interface=st.none() | names,
    ),
)


@given(attachments)
def test_attachment_when_made_into_a_plugged_device_and_back_then_is_the_same(attachment: Attachment) -> None:
    assert attachment_of(plugged_of(attachment)) == attachment

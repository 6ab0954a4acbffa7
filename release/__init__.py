"""What a release is made of (`wheel`) and tried beside (`matrix`)."""
